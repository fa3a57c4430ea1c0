"""`python -m torchpi.cli`, for torchrun, or if the `torchpi` program is not on the path."""

from torchpi.cli import main

if __name__ == "__main__":
    main()
