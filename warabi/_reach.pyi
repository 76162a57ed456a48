# The compiled module has what reach.py has, and nothing else.
from warabi.reach import Grant as Grant
from warabi.reach import Reach as Reach
