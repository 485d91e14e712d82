"""`mdistiller-ext compare` from a checkout."""

from mdistiller_ext.command import run

if __name__ == "__main__":
    run("compare", "python tools/compare.py")
