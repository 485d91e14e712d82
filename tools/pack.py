"""`mdistiller-ext pack` from a checkout."""

from mdistiller_ext.command import run

if __name__ == "__main__":
    run("pack", "python tools/pack.py")
