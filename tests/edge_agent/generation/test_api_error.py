"""Errors as the openai package reads them."""

from __future__ import annotations

from edge_agent.generation.api_error import ApiError


def test_the_type_follows_the_status_and_what_is_empty_is_null() -> None:
    one = ApiError(400, "no", param="seed").as_json()
    assert one == {"error": {"message": "no", "type": "invalid_request_error", "param": "seed", "code": None}}
    other = ApiError(503, "no", code="c").as_json()["error"]
    assert (other["type"], other["param"], other["code"]) == ("server_error", None, "c")
    assert ApiError(429, "no", kind="rate_limit_error").as_json()["error"]["type"] == "rate_limit_error"
