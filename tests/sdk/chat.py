"""A chat completion that is not streamed, by model name and by alias, with the headers of the gateway."""

from gateway import HELLO, client

answer = client().chat.completions.create(model="chat", messages=HELLO, max_tokens=12)
assert answer.object == "chat.completion"
assert answer.choices[0].message.role == "assistant"
assert answer.choices[0].message.content
assert answer.usage.completion_tokens == 12, answer.usage
assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12

raw = client().chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=HELLO, max_tokens=3, n=2)
assert raw.headers["x-tollgate-model"] == "qwen"
assert raw.headers["x-tollgate-attempts"] == "1"
assert raw.headers["x-request-id"]
assert len(raw.parse().choices) == 2

text = client().completions.create(model="chat", prompt="Once upon a time", max_tokens=5)
assert text.choices[0].text
print("ok")
