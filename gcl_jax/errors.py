"""A user's mistake, and a run that was told to stop.

A wrong path, an unknown field, a checkpoint of another model: the user gets one
message that says what is wrong, where, and how to mend it, and exit code 2. Anything
else is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
  """A mistake that the user can mend. The text is the whole message."""


class Preempted(Exception):
  """The job was told to stop, and all that was done is saved."""
