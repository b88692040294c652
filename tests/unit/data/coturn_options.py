"""Print the options that a turnserver binary takes, one a line: name and argument.

    apt-get download coturn && dpkg-deb -x coturn_*.deb x
    python tests/unit/data/coturn_options.py x/usr/bin/turnserver > tests/unit/data/coturn-4.6.1.txt

It reads the table `long_options[]` of src/apps/relay/mainrelay.c out of the binary itself (amd64
or arm64, position independent), so that it lists what this very build takes: Debian's has no
Prometheus. The table is an array of `struct myoption {char *name; int has_arg; int *flag; int val}`
whose pointers are relative relocations; it starts at "listening-device" and ends at a null name.
"""

import struct
import sys
from pathlib import Path

FIRST, SIZE = b"listening-device\0", 32
ARGUMENT = {0: "none", 1: "required", 2: "optional"}  # no_argument... of getopt.h


def sections(elf: bytes) -> list[tuple[int, int, int, int]]:
    """(type, address, file offset, size) of each section."""
    offset, count = struct.unpack_from("<Q", elf, 0x28)[0], struct.unpack_from("<H", elf, 0x3C)[0]
    headers = (struct.unpack_from("<IIQQQQ", elf, offset + i * 64) for i in range(count))
    return [(kind, address, start, size) for _, kind, _, address, start, size in headers]


def options(elf: bytes) -> list[tuple[str, str]]:
    """(name, argument) of each entry of long_options[]."""
    parts = sections(elf)

    def offset(address: int) -> int:
        for kind, base, start, size in parts:
            if (
                kind != 8 and base and base <= address < base + size
            ):  # 8: SHT_NOBITS, not in the file
                return start + address - base
        raise SystemExit(f"no section holds address {address:#x}")

    pointers = {}
    for kind, _, start, size in parts:
        if kind == 4:  # SHT_RELA
            for at in range(start, start + size, 24):
                where, info, addend = struct.unpack_from("<QQq", elf, at)
                if info & 0xFFFFFFFF in (8, 1027):  # R_X86_64_RELATIVE, R_AARCH64_RELATIVE
                    pointers[where] = addend
    names = {
        where: elf[o : elf.index(b"\0", o)] for where, to in pointers.items() if (o := offset(to))
    }
    where = next(w for w, name in sorted(names.items()) if name + b"\0" == FIRST)
    found = []
    while where in names:
        argument = struct.unpack_from("<i", elf, offset(where + 8))[0]
        found.append((names[where].decode(), ARGUMENT[argument]))
        where += SIZE
    return found


if __name__ == "__main__":
    for name, argument in sorted(options(Path(sys.argv[1]).read_bytes())):
        print(name, argument)
