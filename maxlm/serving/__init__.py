"""An HTTP server that speaks as OpenAI's does, over an engine.

served.py: a model as the server needs it
loading.py: a loaded model as one that is served
vectors_only.py: in place of an engine, for a model of vectors
preferences.py: answers that people have ranked
schema.py: what a request may hold
api_errors.py: errors as clients read them
chat_format.py: conversations for a template, schemas of answers
jobs.py: requests of the engine, and their texts
token_names.py: single tokens for people
answers.py: texts as clients read them
connection.py: bodies in, answers out, clients that leave
app.py: the routes
server_metrics.py: what Prometheus reads
other_servers.py: the commands of vLLM and SGLang
listening.py: sockets, signals, the end
"""
