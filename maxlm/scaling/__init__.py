"""Scaling laws: how loss falls with parameters, tokens and FLOPs, and how a budget is best split. docs/scaling.md.

__main__.py: the commands
laws.py: the forms that are fitted, and the best split of a budget in closed form
known_laws.py: constants that papers have published, with sources and misprints
measured_runs.py: runs as they are fitted, from files and run folders
log_fits.py: power laws by least squares, and robust fits of log-losses
envelope.py: approach 1 of Chinchilla, the lowest loss of all training curves
iso_flops.py: approach 2, a parabola for each budget
parametric.py: approach 3, and the joint law of Kaplan et al.
fitting.py: every method on the same runs, intervals by resampling, the file that keeps them
downstream.py: from FLOPs to the likelihood of right answers, and on to accuracy
exam_results.py: what downstream laws are fitted to, from files and folders of maxlm.evaluate
sweep.py: runs over budgets and sizes that maxlm.train takes
drawing.py: curves, parabolas and residuals as a picture
law_tables.py: what the commands print
"""
