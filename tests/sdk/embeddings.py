"""Embeddings of one and of several texts. The SDK asks for base64 unless told otherwise."""

from gateway import client

one = client().embeddings.create(model="embed", input="toll gate")
assert len(one.data) == 1 and len(one.data[0].embedding) > 0
assert all(isinstance(number, float) for number in one.data[0].embedding)

several = client().embeddings.create(model="embed", input=["toll", "gate"], encoding_format="float")
assert [row.index for row in several.data] == [0, 1]
assert several.data[0].embedding != several.data[1].embedding
assert several.usage.prompt_tokens > 0
print("ok")
