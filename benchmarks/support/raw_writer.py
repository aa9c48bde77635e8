"""A process that does nothing but write shared memory to a file, direct and whole: what no persist process can beat.

python raw_writer.py FILE BYTES PATH     FILE: number of the memory's file, inherited. Each line on standard input: once.
Answers time.perf_counter() when it was durable.
"""

import mmap
import os
import sys
import time

PIECE_BYTES = 16 * 2**20
NICENESS = 10


def main() -> None:
    os.nice(NICENESS)
    memory, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    view = memoryview(mmap.mmap(memory, size))
    flags = os.O_WRONLY | os.O_CREAT
    try:
        file = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:  # tmpfs
        file = os.open(path, flags, 0o644)
    for _ in sys.stdin:
        place = 0
        while place < size:
            place += os.pwrite(file, view[place : place + PIECE_BYTES], place)
        os.fsync(file)
        print(time.perf_counter(), flush=True)


if __name__ == "__main__":
    main()
