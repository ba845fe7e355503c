"""What stands before the application: who may ask, and how much and how long a body may be.

Everything here decides before a body is held in memory, in the order of its cost: the key, the name, the size.
"""

import asyncio
import dataclasses
import hmac
import ipaddress
from typing import Any

from nemotron_dspark.errors import InputError
from nemotron_dspark.serving import needs_extra
from nemotron_dspark.serving.protocol import ApiError, error_json

with needs_extra():
    from starlette.datastructures import Headers
    from starlette.responses import JSONResponse

MAX_BODY = 16 * 1024**2  # bytes
BODY_SECONDS = 60.0  # between two pieces of a body
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}  # asks for the key itself
_OPEN = ("/health", *PAGE)  # whoever balances load has no key, and learns two numbers


def reachable_by_others(host: str) -> bool:
    """Whether other machines can reach ``host``, as an address to listen on."""
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # a name
        return host.lower() != "localhost"


@dataclasses.dataclass(frozen=True)
class Access:
    """Who is answered: holders of ``key``; without one only this machine, or everybody if ``open_to_all``.

    Raises:
        InputError: a key that no header can carry.
    """

    key: str | None = dataclasses.field(default=None, repr=False)
    open_to_all: bool = False

    def __post_init__(self) -> None:
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and self.key.strip(" ")):
            raise InputError(
                "The API key is empty or holds characters that no HTTP header can carry.",
                "Choose printable ASCII, such as `openssl rand -hex 16` prints.",
            )

    def check_host(self, host: str) -> None:
        """`InputError` when other machines could reach ``host`` and nobody said whether they may."""
        if self.key is None and not self.open_to_all and reachable_by_others(host):
            raise InputError(
                f"{host} can be reached by other machines, and the server has no API key.",
                "Set the environment variable NDS_API_KEY or give --api-key; or say --no-auth to answer everybody.",
            )

    def refusal(self, headers: "Headers") -> ApiError | None:
        """Why a request with these headers is not answered; None when it is."""
        if self.key is not None:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode()):
                return None
            what = "The API key is wrong." if given else "This server asks for an API key."
            return ApiError(401, what, "Send it as `Authorization: Bearer KEY`.", code="invalid_api_key")
        # A web page may resolve its own name to 127.0.0.1 and then ask here as if the answer were its own.
        host = headers.get("host", "localhost")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self.open_to_all or not reachable_by_others(name):
            return None
        return ApiError(
            403, f"This server has no API key and is not asked under the name {name!r}.", "Ask 127.0.0.1 or localhost."
        )


class Guard:
    """ASGI middleware: refuses whom ``access`` does not let in, and bodies that are too large or do not come."""

    def __init__(self, app: Any, access: Access):
        self._app = app
        self._access = access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = None if scope["path"] in _OPEN else self._access.refusal(Headers(scope=scope))
        if error is not None:
            headers = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else None
            body = error_json(error.status_code, error.detail, code=error.code)
            await JSONResponse(body, error.status_code, headers=headers)(scope, receive, send)
            return
        read, whole = 0, False

        async def counted() -> Any:
            nonlocal read, whole
            try:  # after the body the same call waits for the client to go, for as long as the answer takes
                message = await asyncio.wait_for(receive(), None if whole else BODY_SECONDS)
            except TimeoutError:
                what = f"The body did not come within {BODY_SECONDS:g} seconds."
                raise ApiError(408, what, "Send it without a pause.") from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > MAX_BODY:
                raise ApiError(413, f"The body is larger than {MAX_BODY // 1024**2} MiB.", "Send a shorter prompt.")
            return message

        await self._app(scope, counted, send)
