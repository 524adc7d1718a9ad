"""Run the command `svfap` as `python -m svfap_dist`, which torchrun and srun start."""

from svfap_dist.cli import main

if __name__ == "__main__":
    main()
