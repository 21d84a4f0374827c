"""A streamed chat: without usage, with it, over the async client, and for text completions."""

import asyncio

from gateway import HELLO, async_client, client


def words(chunks):
    return [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]


chunks = list(client().chat.completions.create(model="chat", messages=HELLO, max_tokens=12, stream=True))
assert len(words(chunks)) == 12, chunks
assert chunks[0].choices[0].delta.role == "assistant"
assert chunks[-1].choices[0].finish_reason in ("length", "stop"), chunks[-1]
assert all(c.usage is None for c in chunks), "usage was not asked for"
assert all("usage" not in c.model_fields_set for c in chunks), "not even as null"
assert all(c.choices for c in chunks), "no extra chunk"

options = {"include_usage": True}
chunks = list(client().chat.completions.create(model="chat", messages=HELLO, max_tokens=12, stream=True, stream_options=options))
assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12, chunks[-1]
assert len(words(chunks)) == 12


async def several():
    async def one():
        stream = await async_client().chat.completions.create(model="chat", messages=HELLO, max_tokens=12, stream=True)
        return words([chunk async for chunk in stream])

    for got in await asyncio.gather(*(one() for _ in range(8))):
        assert len(got) == 12


asyncio.run(several())

text = client().completions.create(model="chat", prompt="Once upon a time", max_tokens=5, stream=True)
assert len([c for c in text if c.choices and c.choices[0].text]) == 5
print("ok")
