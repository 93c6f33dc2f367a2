/*
 * A guest that writes to so many pages each millisecond: pace_guest.py tells what it is for.
 *
 * The rule of the file: between two ticks it is halted, so that it costs its host what it writes and not more. Real mode
 * with data segments of 4 GiB. PAGES, BEGIN and END come from the command line; at 0x8000 it counts what it has done.
 */
#define DONE 0x8000
#define TICKS 0x8004
#define PERIOD 1193

        .code16
        cli
        cld
        xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %ss
        movw $0x7c00, %sp
        movl %eax, DONE
        movl %eax, TICKS
        inb $0x92, %al                  /* A20 */
        orb $2, %al
        outb %al, $0x92
        lgdtl gdt_register
        movl %cr0, %eax
        orb $1, %al
        movl %eax, %cr0
        movw $8, %bx
        movw %bx, %ds
        andb $0xfe, %al
        movl %eax, %cr0
        xorw %ax, %ax
        movw %ax, %ds

        movw $tick, 8 * 4               /* the timer's interrupt is ours, and the only one */
        movw %ax, 8 * 4 + 2
        movb $0x34, %al
        outb %al, $0x43
        movb $(PERIOD & 255), %al
        outb %al, $0x40
        movb $(PERIOD >> 8), %al
        outb %al, $0x40
        movb $0xfe, %al
        outb %al, $0x21

        movl $BEGIN, %edi
        xorl %esi, %esi
next:   cli
        cmpl %esi, TICKS
        jne work
        sti
        hlt
        jmp next
work:   sti
        incl %esi
        movl $PAGES, %ecx
write:  incb (%edi)
        addl $4096, %edi
        cmpl $END, %edi
        jb more
        movl $BEGIN, %edi
more:   decl %ecx
        jnz write
        movl %esi, DONE
        jmp next

tick:   pushw %ax
        incl TICKS
        movb $0x20, %al
        outb %al, $0x20
        popw %ax
        iret

        .balign 8
gdt:    .quad 0
        .quad 0x00cf92000000ffff        /* data, 4 GiB */
gdt_register:
        .word 15
        .long gdt
