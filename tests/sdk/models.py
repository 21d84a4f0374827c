"""The list of models, and one of them."""

from gateway import client

ids = {model.id for model in client().models.list()}
assert {"chat", "embed"} <= ids, ids
assert client().models.retrieve("chat").id == "chat"
print("ok")
