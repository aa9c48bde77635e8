"""What the URL of a broker says, and how it is shown to people: never with its password."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from holdfast.errors import ConfigError

PASSWORD_VARIABLE = "HOLDFAST_QUEUE_PASSWORD"
"""Where a URL names a user or a host and no password, so that job files hold none."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
SECRET_OPTION = re.compile(r"pass|secret|token|key|sig", re.IGNORECASE)


def redacted(url: str) -> str:
    """`url` without what could be a secret: it may stand in logs, errors and reports."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if at:
        user = f"{user.partition(':')[0]}:***" if ":" in user else user
    query = urlencode(
        [(name, "***" if SECRET_OPTION.search(name) else value) for name, value in parse_qsl(parts.query)], safe="/:*"
    )
    return f"{parts.scheme}://{user}{at}{host}{parts.path}" + (f"?{query}" if query else "")


def check_name(name: str) -> str:
    """Raises ConfigError."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of a queue: use up to 200 letters, digits and . _ / - (a letter first)")
    return name


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """`scheme://user:password@host:port/path?option=value` of a broker that is a server."""

    scheme: str
    host: str
    port: int
    user: str
    password: str = field(repr=False)
    path: str
    options: dict[str, str]

    @classmethod
    def parse(cls, url: str, default_port: int, known_options: tuple[str, ...] = ()) -> ServerAddress:
        """Raises ConfigError."""
        shown, parts = redacted(url), urlsplit(url)
        try:
            port = parts.port or default_port
        except ValueError:
            raise ConfigError(f"queue {shown}: its port is no number up to 65535") from None
        if not parts.hostname:
            raise ConfigError(f"queue {shown}: it names no host; write {parts.scheme}://host:{default_port}/")
        if parts.fragment:
            raise ConfigError(f"queue {shown}: a '#' in a password is written %23")
        options = options_of(url, known_options)
        password = unquote(parts.password) if parts.password else os.environ.get(PASSWORD_VARIABLE, "")
        return cls(
            parts.scheme, parts.hostname, port, unquote(parts.username or ""), password, unquote(parts.path), options
        )

    @property
    def shown(self) -> str:
        user = f"{quote(self.user)}@" if self.user else ""
        query = f"?{urlencode(self.options, safe='/:')}" if self.options else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{user}{host}:{self.port}{quote(self.path)}{query}"


def options_of(url: str, known: tuple[str, ...]) -> dict[str, str]:
    """Of a URL's query. Raises ConfigError for one that the broker doesn't know, or says twice."""
    said = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    for name, value in said:
        if name not in known:
            can = f"only {', '.join(known)}" if known else "which has no options"
            raise ConfigError(f"queue {redacted(url)}: it can't say {name!r} of this broker, {can}")
        if not value or len([one for one, _ in said if one == name]) > 1:
            raise ConfigError(f"queue {redacted(url)}: give {name!r} one value, or leave it out")
    return dict(said)
