"""The graph axis: who compiles what lies between two attentions."""
