/*
 * A guest that says how long its touches of random pages take: touch_guest.py tells what it is for.
 *
 * The rule of the file: between the two looks at the clock there is one load and nothing else; whatever talks to a
 * device comes before or after. Fits into a boot sector. TOUCHES, PAGES and BEGIN come from the command line.
 */
#define COM1 0x3f8
#define LINE_STATUS 0x3fd
#define RECEIVED 0x01
#define MAY_SEND 0x20
#define LOG 0x10000

        .code16
        cli
        cld
        xorw %ax, %ax
        movw %ax, %ds
        inb $0x92, %al                  /* A20 */
        orb $2, %al
        outb %al, $0x92
        lgdtl gdt_register
        movl %cr0, %eax
        orb $1, %al
        movl %eax, %cr0
        ljmp $8, $flat

        .code32                         /* no paging */
flat:   movw $0x10, %ax
        movw %ax, %ds
        movw %ax, %ss
        movl $0x7c00, %esp

/* How many ticks the timer's channel 2 takes for 0xffff periods of 1193182 Hz: four times, for the shortest counts. */
        movl $LOG, %edi
calibrate:
        inb $0x61, %al                  /* gate on, speaker off */
        andb $0xfc, %al
        orb $1, %al
        outb %al, $0x61
        movb $0xb0, %al                 /* channel 2, mode 0: its output rises at the end */
        outb %al, $0x43
        movb $0xff, %al
        outb %al, $0x42
        outb %al, $0x42
        rdtsc
        movl %eax, %ebx
count:  inb $0x61, %al
        testb $0x20, %al
        jz count
        rdtsc
        subl %ebx, %eax
        movl %eax, (%edi)
        addl $4, %edi
        cmpl $(LOG + 16), %edi
        jb calibrate
        movl $16, %ecx
        call tell

/* The word to begin comes when the machine runs at its destination. */
        movw $LINE_STATUS, %dx
wait:   pause
        inb %dx, %al
        testb $RECEIVED, %al
        jz wait

        movl $0x9e3779b9, %edi          /* xorshift32 */
        movl $LOG, %ebp
another:
        movl %edi, %eax
        shll $13, %eax
        xorl %eax, %edi
        movl %edi, %eax
        shrl $17, %eax
        xorl %eax, %edi
        movl %edi, %eax
        shll $5, %eax
        xorl %eax, %edi
        movl $PAGES, %eax               /* the state scaled to a page number, in edx */
        mull %edi
        movl %edx, %ebx
        shll $12, %ebx
        rdtsc
        movl %eax, %esi
        movb BEGIN(%ebx), %cl           /* the touch */
        rdtsc
        subl %esi, %eax
        movl %eax, (%ebp)
        addl $4, %ebp
        cmpl $(LOG + 4 * TOUCHES), %ebp
        jb another
        movl $(4 * TOUCHES), %ecx
        call tell
halt:   hlt
        jmp halt

/* Send ecx bytes of the log. */
tell:   movl $LOG, %esi
next:   movw $LINE_STATUS, %dx
        inb %dx, %al
        testb $MAY_SEND, %al
        jz next
        movw $COM1, %dx
        lodsb
        outb %al, %dx
        loop next
        ret

        .balign 8
gdt:    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_register:
        .word . - gdt - 1
        .long gdt
