"""The measuring harness: what ``fastlora bench`` and everything in ``benchmarks/`` run on.

shapes      the models and linears that are measured
providers   what is compared, and how another library joins
accuracy    the rule for numbers
checking    the gate: nothing is timed before it computes the right thing
measuring   providers in turn, round by round; ratios with their spread
counting    bytes, launches, FLOPs and saved memory, counted without a GPU
operations, modules, steps   what is built at each level
results     the rows: CSV, the table of a model, two runs compared
session     a whole run: which levels fit, in which order, until when
report      figures and a page from the rows
"""
