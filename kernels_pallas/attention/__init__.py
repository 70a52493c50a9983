"""Softmax attention without the T x S score matrix in memory."""
