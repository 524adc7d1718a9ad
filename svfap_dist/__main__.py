"""`python -m svfap_dist` is the command `svfap`: what torchrun and srun start."""

from svfap_dist.cli import main

if __name__ == "__main__":
    main()
