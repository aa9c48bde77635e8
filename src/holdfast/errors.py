"""One root, one child per next move: the class is the advice, so nobody parses messages."""


class HoldfastError(Exception):
    """Root. Catch it at the top; raise a child."""


class ConfigError(HoldfastError):
    """Can never work as asked. Fix the request."""


class TransientError(HoldfastError):
    """The same call may work shortly. Retry it."""


class CredentialsError(TransientError):
    """The account's credentials have ended or are refused. Renew them; what waits goes on by itself."""


class CapacityError(HoldfastError):
    """This pool is empty. Try another pool, or wait."""


class QuotaError(HoldfastError):
    """The account may not have more of this. Ask for quota, or use another pool."""


class PreemptedError(HoldfastError):
    """The machine was taken away. Resume elsewhere."""


class ProgramFailedError(HoldfastError):
    """The user's program ended with an error of its own. Read its log."""


class OverBudgetError(HoldfastError):
    """Going on would pass the cap on dollars, hours or machines. Raise the cap, or stop."""


class RunTakenError(HoldfastError):
    """Another live process works on this run. Wait for it, or end it."""


class DamagedCheckpointError(HoldfastError):
    """A checkpoint's bytes are not what its manifest says. Use the one before."""


class AlreadyExistsError(HoldfastError):
    """A conditional create found the key taken. Somebody else was first."""


class NotFoundError(HoldfastError):
    """There is no object under this key."""
