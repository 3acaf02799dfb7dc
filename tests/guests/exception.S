# Executes an undefined instruction: the handler of every guest says so, and ends the run as failed.
    .include "prelude.inc"
main:
    PRINT "before\n"
    ud2
