"""``python -m logitcask``, ``torchrun -m logitcask``, ``accelerate launch -m logitcask``."""

from logitcask.pipeline.cli import main

if __name__ == "__main__":
    main()
