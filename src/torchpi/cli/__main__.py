"""`python -m torchpi.cli`, for torchrun and where the program `torchpi` is not on the path."""

from torchpi.cli import main

if __name__ == "__main__":
    main()
