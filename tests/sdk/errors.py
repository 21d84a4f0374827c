"""Refusals of the gateway arrive as the SDK's own exceptions, with code and parameter."""

import openai
from gateway import FREE_KEY, HELLO, client


def refused(kind, **call):
    given = {"model": "chat", "messages": HELLO, "max_tokens": 2, **call}
    try:
        using(**given)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


using = client("wrong-key").chat.completions.create
error = refused(openai.AuthenticationError)
assert (error.status_code, error.code) == (401, "invalid_api_key"), error
assert error.request_id

using = client().chat.completions.create
error = refused(openai.NotFoundError, model="nothing")
assert (error.code, error.param) == ("model_not_found", "model"), error
error = refused(openai.BadRequestError, extra_body={"stream": "yes"})
assert (error.code, error.param) == ("invalid_request", "stream"), error
error = refused(openai.NotFoundError, model="nothing", stream=True)
assert error.code == "model_not_found"

# The free tier has 60 requests a minute: the SDK is told so, and when to come back.
using = client(FREE_KEY).chat.completions.create
for _ in range(60):
    using(model="chat", messages=HELLO, max_tokens=1)
error = refused(openai.RateLimitError)
assert (error.status_code, error.code, error.type) == (429, "rate_limit_exceeded", "requests"), error
assert 0 < int(error.response.headers["retry-after"]) <= 60
print("ok")
