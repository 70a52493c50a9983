"""Cleaning text: what a document must be to be learned from, and which ones are there twice.

findings.py: a step as a function of one document
unicode.py: normal forms, and damage that encodings did
html_text.py: the text of pages in HTML
word_splitting.py: which characters make words, for rules, signatures and n-grams alike
text_features.py: lines and words of a text, for all the steps that look at it
line_rules.py: lines that go
quality.py: rules of quality for text
repetition.py: how much of a document repeats itself
code_rules.py: rules for source files
latex.py: papers
by_source.py: answers, books, articles, licences
languages.py: which language a document is in
word_lists.py: words and addresses that are not wanted
stages.py: work in stages, and steps that compare documents
models_for_cleaning.py: what steps ask of models
parts.py: the input in parts, pages as lines
tallies.py: counts that add up over parts
document_pass.py: documents through steps, one by one
cleaning_work.py: a job's folder: passes, tasks, what is done
local_pool.py: stages in processes of this machine
cluster.py: stages by datatrove: SLURM, Ray
report_charts.py: histograms of what rules measured
clean_report.py: funnel, histograms, samples as a page and JSON
hashed_words.py: words and runs of words as numbers
drawn.py: chance that a text decides
key_tables.py: many numbers looked up at once
personal_data.py: addresses and numbers of persons, found and masked
secrets_found.py: keys and passwords
check_digits.py: numbers that carry a check of themselves
ngram_model.py: perplexity by an n-gram model
ngram_training.py: its training: modified Kneser-Ney
quality_classifier.py: hashed words or vectors through a softmax
classifier_training.py: its training and its report
score_filters.py: steps that ask a classifier or a large model
evaluation_runs.py: evaluations as runs of words
decontamination.py: those runs in training text: reported, dropped, cut
sorted_files.py: records by which tasks hand on what others need
exact_duplicates.py: documents, paragraphs, lines, sentences that are there twice
minhash.py: signatures of documents
union_find.py: clusters of what is joined by pairs
similar_documents.py: clusters of similar documents
substrings.py: stretches of text that are there twice
semantic.py: documents that mean the same
duplicate_verdicts.py: what becomes of copies
making.py: from a step's config to what it does
"""
