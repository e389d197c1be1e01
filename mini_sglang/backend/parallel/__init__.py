"""One model over several ranks: what each holds, how they add up, and the processes of those that follow."""
