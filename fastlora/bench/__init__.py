"""The measuring harness: what ``fastlora bench`` and everything in ``benchmarks/`` run on.

shapes      the models and linears that are measured
providers   what is compared, and how another library joins
accuracy    the rule for numbers
checking    the gate: nothing is timed before it computes the right thing
measuring   providers in turn, round by round; ratios with their spread
counting    bytes, launches, FLOPs and saved memory, counted without a GPU
operations, modules, steps   what is built at each level
environment  what a row was made with
results     the rows, and the CSV files that they are kept in
summary     what the rows say: the table of models, the headline, two runs compared
planning    which cases a run has
session     a whole run
report      figures and a page from the rows
arguments, command   `fastlora bench`
"""
