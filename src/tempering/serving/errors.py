"""Errors as clients of OpenAI's protocol read them: a status, and `{"error": {message, type, param, code}}`.

Refuses to repeat what a client sent: that may be a prompt or a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ErrorBody(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    """What we got, what we expected, what to do."""
    type: str
    """The kind of error."""
    param: str | None
    """The field of the request, where it is one's fault."""
    code: str | None
    """A word for programs."""


class ErrorReply(BaseModel):
    """Every reply that is no answer."""

    error: ErrorBody


class ApiError(Exception):
    """A request that is not answered, with the status that it gets."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The reply."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Word the first fault that validation found, without what was sent.

    Of a field that takes several forms, the fault of the form that was nearest: one that is only of another type
    says little.
    """
    field = errors[0]["loc"][:2]
    of_field = [error for error in errors if error["loc"][:2] == field]
    first = min(of_field, key=lambda error: str(error["type"]).endswith("_type"))
    where = [str(part) for part in first["loc"][1:] if not _is_form(str(part))]
    name = ".".join(where)
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if first["type"] == "missing":
        what = f"field {name!r} is required" if name else "a JSON body is required"
        return ApiError(400, what, param=name or None, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"field {name!r} is not known to this server; leave it out", param=name, code="unknown_parameter"
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{name}: {message}" if name else message, param=name or None, code="invalid_value")


def _is_form(part: str) -> bool:
    """Whether a step of a path is pydantic's name of one of several forms, and no field or place."""
    return part == "str" or "[" in part or part.startswith(("constrained-", "function-", "tagged-"))
