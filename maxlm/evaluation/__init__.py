"""How good a model is: held-out loss and the figures that follow from it, and marks in exams.

perplexity.py: loss, perplexity, bits per byte over batches
scoring.py: what a model is asked: log-probabilities of continuations, texts
exams.py: questions and how they are marked, from JSONL files
suite.py: exams that come with maxlm, made from a seed
examining.py: from an exam and a model to marks
marking.py: marks of single answers, intervals, pass@k
prompting.py: how questions are put: the settings
demonstrations.py: solved questions before a question, and their order
reasoning.py: chains of thought, votes
confidence.py: calibration, and whom to answer
side_by_side.py: the same prompts put to several models
judgements.py: held-out texts of reward models, preferences, classifiers, vectors
ratings.py: Elo, win rates, rewards of two models as one
verifiers.py: answers verified without a model: numbers, formats, tests
json_schema.py: whether a value is what a JSON schema allows
time_limit.py: a limit on the time of a call
asked.py: tests ask a program, in the sandbox; a module of its own
sandbox.py: runs programs that a model wrote
confined.py: the sandbox from inside, a program of its own
harness.py: a model for lm-eval
cleaning_models.py: runs that steps of data cleaning ask
results.py: marks as a table, JSON, a picture
"""
