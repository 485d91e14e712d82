"""`mdistiller-ext mdistiller-train` from a checkout."""

from mdistiller_ext.command import run

if __name__ == "__main__":
    run("mdistiller_train", "python tools/mdistiller_train.py")
