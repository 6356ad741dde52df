"""What the store tells of runs that others have started: how they fare, where they stand, what they print.

Everything works from the store alone. Where the backend of a run's job can be asked from here, it is asked, too.
"""
