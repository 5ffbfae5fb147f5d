"""Forward and backward arithmetic of every op, one folder per op, one file per backend. No autograd here."""
