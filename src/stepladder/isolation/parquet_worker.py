"""The process that reads a Parquet file, run as a script under ``python -I``: a row a line, as JSON. It ends with 2
where the file is no Parquet, with 3 where it takes more memory than it may."""

from __future__ import annotations

import json
import resource
import sys

MEBIBYTES = 2048
"""Of address space; the libraries take a third of it."""
CPU_SECONDS = 600
BATCH_ROWS = 16


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEBIBYTES << 20, MEBIBYTES << 20))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        import pyarrow
        import pyarrow.parquet

        pyarrow.set_cpu_count(1)
        pyarrow.set_io_thread_count(1)
        file = pyarrow.parquet.ParquetFile(sys.argv[1], pre_buffer=False)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
            for row in batch.to_pylist():
                sys.stdout.write(json.dumps(row, default=str) + "\n")
    except MemoryError:
        return 3
    except (OSError, ValueError, pyarrow.ArrowException, RecursionError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
