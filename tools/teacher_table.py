"""`mdistiller-ext teacher-table` from a checkout."""

from mdistiller_ext.command import run

if __name__ == "__main__":
    run("teacher_table", "python tools/teacher_table.py")
