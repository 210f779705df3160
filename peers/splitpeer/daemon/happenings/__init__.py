"""Events of a daemon, as data: reported once, by the code that knows, and put into words by the `sinks`. A
new one that is only a line of the log says so on its class; for more, decide in each sink how it is shown: a sink
that does not know it ignores it. Runs are named in
full, in hexadecimal; times are seconds.
"""

from splitpeer.daemon.happenings.any_daemon import *  # noqa: F403
from splitpeer.daemon.happenings.base import *  # noqa: F403
from splitpeer.daemon.happenings.coordinator import *  # noqa: F403
from splitpeer.daemon.happenings.remote_site import *  # noqa: F403
from splitpeer.daemon.happenings.site import *  # noqa: F403
