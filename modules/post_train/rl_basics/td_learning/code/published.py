"""The same experiments as simulated by others, with 100 runs and more: what the module's means are compared with."""

WITHIN = 0.15  # how far a mean may be from a value below
TD_MEAN, N_4 = "Example 6.2: TD, α 0.1, mean over episodes", "Figure 7.2: n = 4, best α"
BEST_MC = "Example 6.2: best MC, mean over episodes"
PUBLISHED = {
    "Example 6.2: TD, α 0.1, after 100 episodes": 0.057,
    "Example 6.2: TD, α 0.05, after 100 episodes": 0.036,
    "Example 6.2: MC, α 0.02, after 100 episodes": 0.082,
    "Example 6.2: MC, α 0.03, after 100 episodes": 0.098,
    "Example 6.2: TD, α 0.1, mean over episodes": 0.0685,
    "Example 6.2: best MC, mean over episodes": 0.122,
    "Figure 7.2: n = 1, best α": 0.348,
    "Figure 7.2: n = 2, best α": 0.284,
    "Figure 7.2: n = 4, best α": 0.261,
    "Figure 7.2: n = 8, best α": 0.273,
    "Figure 7.2: n = 16, best α": 0.322,
    "Figure 12.6: λ = 0, best α": 0.345,
    "Figure 12.6: λ = 0.4, best α": 0.273,
    "Figure 12.6: λ = 0.8, best α": 0.274,
    "Figure 12.6: λ = 0.9, best α": 0.304,
    "Example 6.6: SARSA, last 100 episodes": -26.8,
    "Example 6.6: Q-learning, last 100 episodes": -50.0,
    "Example 6.6: expected SARSA, last 100 episodes": -21.3,
}
