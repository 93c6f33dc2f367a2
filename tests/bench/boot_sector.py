"""A guest of 94 bytes that rewrites 64 MiB without pause, as a floppy image for a QEMU.

The rule of the file: what the guest does is what `tests.bench.workload --rewrite` does: for ever, add one to the first
byte of each page of the working set; a round counter at 0x8000 tells how fast.

        cli; xor ax,ax; mov ds,ax            ; real mode, at 0x7c00
        in al,0x92; or al,2; out 0x92,al     ; A20
        lgdt [gdtr]; mov eax,cr0; or al,1; mov cr0,eax; ljmp 8:pm
    pm: mov ax,0x10; mov ds,ax               ; flat 32-bit, no paging
     o: mov edi,0x01000000
     i: inc byte [edi]; add edi,0x1000; cmp edi,0x05000000; jb i
        inc dword [0x8000]; jmp o
"""

from __future__ import annotations

from pathlib import Path

CODE = bytes.fromhex(
    "fa31c08ed8e4920c02e6920f0116587c0f20c00c010f22c0ea1d7c080066b810"
    "008ed8bf00000001fe0781c70010000081ff0000000572f0ff0500800000ebe3"
    "0000000000000000ffff0000009acf00ffff00000092cf001700407c0000"
)
WORKING_SET_BYTES = 64 << 20
ROUNDS_ADDRESS = 0x8000
_FLOPPY_BYTES = 1440 << 10
_CODE_BYTES = 510
_BEGIN = 16 << 20
_CMP_EDI = bytes.fromhex("81ff")


def write_floppy(path: Path, working_set_bytes: int = WORKING_SET_BYTES) -> None:
    """Write a floppy image that boots into a walk over that much memory, from 16 MiB on."""
    end = _BEGIN + working_set_bytes
    code = CODE.replace(
        _CMP_EDI + (_BEGIN + WORKING_SET_BYTES).to_bytes(4, "little"), _CMP_EDI + end.to_bytes(4, "little")
    )
    write_boot_floppy(path, code)


def write_boot_floppy(path: Path, code: bytes) -> None:
    """Write a floppy image that boots into ``code``, at 0x7c00 in real mode."""
    if len(code) > _CODE_BYTES:
        raise ValueError(f"{len(code)} bytes of code, a boot sector holds {_CODE_BYTES}")
    path.write_bytes((code.ljust(_CODE_BYTES, b"\0") + b"\x55\xaa").ljust(_FLOPPY_BYTES, b"\0"))
