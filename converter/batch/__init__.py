"""Nightly conversion: watch releases, convert, prove and publish them, and survive anything.

    watch list + hub ──> discover ──> Ledger ──> engine ──> stages in child processes
                                     (SQL)      (claims, budgets)   (twin, plan, ... publish)

The ledger is the truth. An engine only holds leases on it: whatever dies, the next one to look
finds every release where the ledger says it is.
"""
