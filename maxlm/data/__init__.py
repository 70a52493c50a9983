"""From documents to batches: tokenizers, sources, prepared folders of token shards, packing and the loader.

Only `maxlm.data.loader` imports jax, so that preparing data stays light.

__main__.py: command: prepare data, train tokenizers
sources.py: documents from files, hubs and the standard library
documents.py: a document, what is no text, what could not be read
input_files.py: which files, their bytes decompressed
records.py: JSON, CSV and parquet with many documents each
named_tokenizer.py: which tokenizer a word means
tokenizers.py: bytes, sentencepiece, tokenizer.json
token_bytes.py: what a token of a tokenizer.json adds to a text
named_ends.py: what files beside a tokenizer say of that
build.py: command: records from records, texts and threads
mixing.py: sets of instructions in given shares
wordings.py: records of a task in several wordings
raw_tasks.py: questions out of raw text
sharegpt.py: conversations from web pages, cleaned and split
reply_trees.py: replies to replies as conversations and rankings
tagging.py: answers that say how good they are
ghost.py: an instruction that holds for a conversation
problems.py: problems made by rule, with their answers
near_duplicates.py: ROUGE-L, and texts unlike all before them
chat_report.py: conversations as tokens for people, figures of them
text_ends.py: where texts of a model begin and end
chat.py: conversations to ids, by the template of a published model
chat_worker.py: the process that renders templates
chat_templates.py: built-in templates, and which one a name means
texts.py: texts of post-training with what counts of them, shortened
conversation_formats.py: records of conversations, by their keys
conversations.py: a record as texts, what the assistant wrote
tool_calls.py: calls of tools out of text
passages.py: documents of a folder in pieces
tiktoken.py: a .tiktoken file as a tokenizer.json
train_tokenizer.py: training a tokenizer, compression report
clean.py: command: documents through a pipeline of steps
text_judges.py: command: models that judge documents
claimed.py: files and folders that survive a kill
prepare.py: documents to shards
dealing.py: documents to splits, restartable
encoders.py: documents to tokens, in these processes
workers.py: tokenising processes
writer.py: shard files that survive a kill
shards.py: the prepared folder and its checks
shard_bytes.py: numbers of its files, read where needed
record_windows.py: windows of whole records
packing.py: windows, segments, positions, loss mask
exercises.py: what is given of a text, and what is to be found
predicted_windows.py: windows of such exercises
orders.py: shuffled epochs of several sets, by weights
loader.py: batch(step), mixtures, global arrays
prompts.py: prompts to be answered, with their records
"""
