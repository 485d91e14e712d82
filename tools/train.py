"""`mdistiller-ext train` from a checkout."""

from mdistiller_ext.command import run

if __name__ == "__main__":
    run("train", "python tools/train.py")
