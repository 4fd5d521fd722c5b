"""The engines' table on a GPU, in one line; not run by us yet.

pip install -e '.[vllm]' && python -m tests.benchmarks.gpu_capture Qwen/Qwen3-8B
"""

import sys

from tests.benchmarks import engines


def main() -> None:
    """Print the table for one teacher."""
    teacher = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen3-8B"
    sys.argv = ["gpu_capture", "--teacher", teacher, "--sequences", "256", "--length", "1024", "--rounds", "5"]
    engines.main()


if __name__ == "__main__":
    main()
