"""`mdistiller-ext anatomy` from a checkout."""

from mdistiller_ext.command import run

if __name__ == "__main__":
    run("anatomy", "python tools/anatomy.py")
