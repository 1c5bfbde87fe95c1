"""The pages' style sheet: readable in light and dark, no script, nothing fetched."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2733; --soft: #5d6b7a; --line: #d5dce3; --card: #f7f9fb;
  --even: #2f6db3; --odd: #8456a8; --picture: #d98a2b; --words: #3f8f5f; --untrained: #b9c3cc; --padding: #eceff2;
  --dim: #76818d; --dim-back: #e9ecef; --bad: #b3372f; --mark: #c2542d }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #dfe5eb; --soft: #93a1af; --line: #333c46;
  --card: #1b2127; --even: #6da5e3; --odd: #b78bd8; --picture: #e2a04c; --words: #5fb583; --untrained: #5b6671;
  --padding: #262d34; --dim: #8793a0; --dim-back: #272e36; --bad: #ec7a72; --mark: #f09a78 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 66rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .3rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .2rem; overflow-wrap: anywhere }
a { color: var(--even) } code { font-size: .9em; overflow-wrap: anywhere }
.facts, .note { color: var(--soft); font-size: .9rem; margin: .2rem 0 }
pre { font-size: .8rem; background: var(--card); padding: .8rem; overflow: auto; white-space: pre-wrap }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; font-size: .9rem; padding: .6rem .8rem;
  border: 1px solid var(--line); border-radius: .4rem; margin: 1rem 0 }
.legend i { white-space: pre }
.legend i.key { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem; vertical-align: -.1rem;
  margin-right: .35rem }
.bar { display: block; width: 100%; height: 1.1rem; border-radius: .2rem; background: var(--padding); margin: .4rem 0 }
rect.words, i.words { fill: var(--words); background: var(--words) }
rect.untrained, i.untrained { fill: var(--untrained); background: var(--untrained) }
rect.picture, i.picture { fill: var(--picture); background: var(--picture) }
i.padding { background: var(--padding); border: 1px solid var(--line) } rect.border { fill: var(--ink) }
.fragment { border-left: .35rem solid var(--even); background: var(--card); border-radius: 0 .4rem .4rem 0;
  margin: .7rem 0; padding: .45rem .9rem .7rem }
.fragment.odd { border-color: var(--odd) }
.fragment > header { color: var(--soft); font-size: .8rem; margin-bottom: .3rem }
.body { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4 }
.body > span { unicode-bidi: isolate }
.untrained-words { color: var(--dim); background: var(--dim-back); text-decoration: underline dotted var(--soft);
  text-underline-offset: .2em }
.special { font: .75rem/1 ui-monospace, monospace; color: var(--soft); border: 1px solid var(--line);
  border-radius: .25rem; padding: 0 .25rem; margin: 0 .1rem; vertical-align: .08em }
.special.trained { border-color: var(--words); color: var(--words) }
i.newline::before, i.tab::before { color: var(--mark); font-style: normal; opacity: .65; font-size: .8em }
i.newline::before { content: "↵" } i.tab::before { content: "→" }
i.spaces { background: radial-gradient(circle, var(--mark) 0 1px, transparent 1.5px) left center/.28em 100% }
b.control { font: .7rem ui-monospace, monospace; color: var(--page); background: var(--mark); border-radius: .2rem;
  padding: 0 .2rem }
figure { display: inline-block; margin: .3rem .4rem .3rem 0; vertical-align: top; background: var(--page);
  border: 1px solid var(--line); border-top: .2rem solid var(--picture); border-radius: .3rem; padding: .3rem;
  white-space: normal }
figure img { display: block; max-width: 14rem; max-height: 14rem; background: #fff }
figure .none { display: block; width: 10rem; padding: 1rem .4rem; color: var(--bad); font-size: .8rem }
figcaption { color: var(--soft); font-size: .7rem; line-height: 1.3; max-width: 14rem }
.cut { color: var(--soft); font-style: italic }
.rest { color: var(--soft); font-size: .85rem; background: var(--padding); border-radius: .4rem; padding: .3rem .9rem }
"""
