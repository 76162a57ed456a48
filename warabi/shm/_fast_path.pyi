# The compiled module has what fast_path.py has, and nothing else.
from warabi.shm.fast_path import Grant as Grant
from warabi.shm.fast_path import Reach as Reach
