"""``python -m batchproc``: the command line where its script is not on the path, as in a batch job."""

from batchproc.cli import main

if __name__ == "__main__":
    main()
