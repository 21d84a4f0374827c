"""A stream given up in the middle, by the sync and by the async client; the same client goes on working."""

import asyncio

from gateway import HELLO, async_client, client

same = client()
stream = same.chat.completions.create(model="chat", messages=HELLO, max_tokens=400, stream=True)
for count, _ in enumerate(stream):
    if count == 3:
        break
stream.close()
assert same.chat.completions.create(model="chat", messages=HELLO, max_tokens=2).choices[0].message.content


async def by_task():
    async with async_client() as asking:

        async def read():
            async for _ in await asking.chat.completions.create(model="chat", messages=HELLO, max_tokens=400, stream=True):
                seen.set()

        seen = asyncio.Event()
        task = asyncio.create_task(read())
        await seen.wait()
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        again = await asking.chat.completions.create(model="chat", messages=HELLO, max_tokens=2)
        assert again.choices[0].message.content


asyncio.run(by_task())
print("ok")
