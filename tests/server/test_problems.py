"""Problem details: which status an error of ours has, and that an unforeseen one tells nothing."""

from __future__ import annotations

import inspect
import json

import pytest
from starlette.requests import Request

from kailash_nb import exceptions
from kailash_nb.server import problems

STATUS = {
    "WorkflowNotFoundError": 404,
    "RunNotFoundError": 404,
    "ParameterError": 422,
    "WorkflowError": 422,
    "WorkflowDefinitionError": 422,
    "ResourceError": 422,
    "ResourceNotFoundError": 422,
    "ResourceConfigError": 422,
    "ResourceCredentialsError": 409,
    "ResourceUnavailableError": 503,
    "PoolExhaustedError": 503,
    "SecretError": 409,
    "SecretNotFoundError": 409,
    "SecretKeyError": 409,
    "SecretIntegrityError": 409,
    "SecretBindingError": 409,
    "StoreError": 503,
    "FencedError": 503,
    "ServiceError": 503,
    "KailashError": 500,
    "NodeError": 500,
    "NodeNotFoundError": 500,
    "NodeTimeoutError": 500,
    "UnsupportedValueError": 500,
}
ARGUMENTS = {
    "WorkflowNotFoundError": ("etl", ["elt"]),
    "WorkflowDefinitionError": ("etl", ["one", "two"]),
    "ParameterError": ("etl", ["one", "two"]),
    "ResourceNotFoundError": ("db", ["dc"]),
    "ResourceConfigError": ("database", ["one", "two"]),
    "SecretNotFoundError": ("key", []),
    "RunNotFoundError": ("1",),
}
ERRORS = [e for e in vars(exceptions).values() if inspect.isclass(e) and issubclass(e, exceptions.KailashError)]
KEYWORDS = {"NodeError": {"node": "load"}, "ResourceUnavailableError": {"outcome": "not sent"}}


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_has_a_status_and_a_type_of_its_own(kind):
    error = kind(*ARGUMENTS.get(kind.__name__, ("it is wrong",)), **KEYWORDS.get(kind.__name__, {}))

    answer = problems.of_error(error)

    told = json.loads(answer.body)
    assert answer.status_code == told["status"] == STATUS[kind.__name__]
    assert answer.media_type == "application/problem+json"
    assert told["detail"] == str(error)
    assert told["type"].removeprefix("urn:kailash-nb:problem:").replace("-", "") + "error" == kind.__name__.lower()
    assert told["title"].lower().replace(" ", "-") == told["type"].rpartition(":")[2]
    assert ("retry-after" in answer.headers) == (answer.status_code == 503)
    assert told.get("problems", []) == list(getattr(error, "problems", []))


async def test_what_nobody_foresaw_is_logged_and_told_without_details(caplog):
    @problems.answering
    async def endpoint(request):
        raise KeyError("hunter2")

    answer = await endpoint(Request({"type": "http", "method": "GET", "path": "/a\nb", "headers": []}))

    assert answer.status_code == json.loads(answer.body)["status"] == 500
    assert json.loads(answer.body)["type"] == "about:blank"
    assert b"hunter2" not in answer.body and b"KeyError" not in answer.body
    assert caplog.records[0].message == r"GET '/a\nb' failed"
    assert caplog.records[0].exc_info[0] is KeyError
