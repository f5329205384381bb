"""Teachers that can be asked: one file per way to reach one, the answers, the ledger, the replay store."""
