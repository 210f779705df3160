"""What happens to a daemon, as data: told once, by the code that knows it, and put into words by the `sinks`.

A new happening needs a decision in each sink on what people see of it; a sink that does not know it says nothing.
Runs are named in full, in hexadecimal; times are seconds.
"""

from splitpeer.daemon.happenings.any_daemon import *  # noqa: F403
from splitpeer.daemon.happenings.base import *  # noqa: F403
from splitpeer.daemon.happenings.coordinator import *  # noqa: F403
from splitpeer.daemon.happenings.remote_site import *  # noqa: F403
from splitpeer.daemon.happenings.site import *  # noqa: F403
