"""The client that every script uses: the SDK as it is, pointed at the gateway."""

import os

from openai import AsyncOpenAI, OpenAI

URL = os.environ["TOLLGATE_URL"] + "/v1"
KEY = os.environ["TOLLGATE_KEY"]
FREE_KEY = os.environ["TOLLGATE_FREE_KEY"]
HELLO = [{"role": "user", "content": "Say something about toll gates."}]


def client(key: str = KEY, **more) -> OpenAI:
    return OpenAI(base_url=URL, api_key=key, max_retries=0, timeout=20, **more)


def async_client(key: str = KEY) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=URL, api_key=key, max_retries=0, timeout=20)
