"""Makes ptb.json.gz: lines with the words that the official COCO code takes from them.

    pip install pycocoevalcap     # and java
    python tests/golden/make_ptb.py

Run once; the tests read the file alone. `captions` are sentences as people write them under pictures, put together from the
lists below; `odd` are lines that try to be difficult; `languages` are captions in other languages than English.
"""

import gzip
import json
import random
import re
import unicodedata
from pathlib import Path

from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

WHO = """a man|A man|two women|The woman|a little girl|Several people|a group of people|A baseball player|someone|a small dog|an old cat|
three zebras|a black-and-white cow|a man's hand|the dog's owner|children|A young boy|a bride & groom|a T-shirt-wearing man|Mr. Bear|
St. Nicholas|a firefighter|the U.S. president|a D.J.|a 10-year-old girl|an elderly couple|A person (probably a chef)|the boys' team|
a mother and her baby|no one|Dr. Smith|an out-of-focus person|a half-eaten sandwich|the cat that's orange""".replace(
    "\n", ""
).split("|")
DOES = """is riding|rides|is sitting on|holds|isn't holding|are looking at|doesn't see|'s eating|stands next to|can't reach|cannot reach|
is about to throw|wants to eat|is gonna eat|leans against|is lying in front of|has been playing with|don't care about|flies over|
smiles at|is posing w/|couldn't lift|they're watching|jumps over|who's holding|let's go of|takes a picture of|won't let go of""".replace(
    "\n", ""
).split("|")
WHAT = """a surfboard|the wave|a red stop sign|two slices of pizza|a stop sign that says "stop"|a sign reading 'no parking'|a laptop|
an umbrella|a half-eaten donut|a well-lit room|the "Eat Here" sign|a 747 airplane|a 5-foot-tall teddy bear|a bowl of mac & cheese|
a number 7 jersey|the clock at 3:30|a $5 bill|the 2nd floor|1,000 birds|a kite (red, blue and green)|a cell phone/camera|a Wii remote|
a vase of flowers|the boys' bikes|
women's shoes|the dogs|a two-story bus|a TV|an 8 ft. fence|a sofa, a chair and a lamp|a rock 'n' roll band|
a mid-air frisbee|the A/C unit|
black/white photo|a bus no. 5|the '80s car|the 1950s car|a jack-o-lantern|the frisbee's edge|a hot-dog""".replace(
    "\n", ""
).split("|")
WHERE = """on the beach|in a kitchen|at 5 o'clock|at 5 p.m.|in Washington, D.C.|on St. Mark's square|near the Rd. sign|in front of a mirror|
on top of a table|during the day|in the snow; it is cold|at night - in the rain|while others watch|in a field of tall grass|next to a tree|
under a blue sky with clouds|in N.Y. City|on the left-hand side|outside|in mid-air|on Sept. 5|on Main St. today|inside of a restaurant|
with their friends|behind a chain-link fence|by the water's edge|in the U.S.|-- and it's wet|... maybe|(black and white)|, again""".replace(
    "\n", ""
).split("|")
END = ["", ".", ".", ".", ".", " .", "!", "...", "?", ". ", ".\n", "!!", ";", ","]

_ODD = r"""he/she and/or km/h 24/7 w/ w/o s/he
y'all y'all're ma'am o'neil l'eau 'tis more'n lemme gimme gotta c'mon ain't won't shan't
the dogs' bowls the boss's hat 's ' it's' 'hello' 'em 'n
#1 #hashtag @home user@mail.com www.foo.com foo.com http://x.y/z?a=b
$5.00 $1,000 US$5 5$ 50% 50 % 20° 20°C 6' 5" 5'10" 5ft 10x10 4x4
mid-air semi- -ing a--b a - b a-b-c x-ray, pre-1990 20-30 1-2-3 555-1234
1st 2nd 1950s '50s 3:30pm 3:30 10:00:00 1.5 .5 1. 2.a a.b a.b.c
wow!!! what?? ?! ... .... .. . ,,, ;; :: --- ---- ----- ___ *** ~~ == <3
:) ;-) :-( :D
<b>bold</b> <unk> < > <= >= -> => {x} [x] (x)
"hello" “hello” ‘hello’ ``x'' „x“ ' " ` ´ ’s it’s don’t
AT&T R&B b&w black & white &lt; &quot; &amp;
St. Mt. Ave. Rd. Blvd. ft. in. lb. lbs. oz. approx. no. jr. sr. inc. co. ltd. vs. etc. e.g. i.e. a.k.a. p.m. P.M. U.S.A. u.s. d.c. D.C.
jan. feb. mar. apr. may. jun. jul. aug. sept. oct. nov. dec. mon. tue. tues. wed. thu. thur. thurs. fri. sat. sun.
mr. mrs. ms. dr. prof. gen. rep. sen. gov. capt. lt. sgt. col. maj. rev. hon. pres. st. ste. fig. figs. pp. p. vol. ed. dept.
café naïve über 日本 日本語 ñandú œuvre 😀 dog😀 ☃ ½ ¼ ¾ × ÷ ± ™ ® © • … – — −
two words with  double   spaces and	tab
cannot can't cant' can not  gonna gon-na wanna-be dunno whaddya watcha
rock'n'roll rock 'n' roll fish'n'chips o'clock four-o'clock jack-o-lantern men's women's
a's the 7's 7s' b-52's pb&j m&m's m&ms 7-eleven 7/11 9/11/2001 2001-09-11 9-11
A man.He sits a man,he sits a man;he a man:he sits
U.S.
the U.S
n' n't does n't  doesn 't isnt Dont
t-shirt. t.v. T.V. tv. v.s. w.c. B.B. King J.R.R. Tolkien
1,2 1,23 1,234 1,2345 12,34,567 1,000,000.50 1.2.3 1.2.3.4 -5 +5 5- ±5 5*5 5=5 2^3
50-50 50/50 5/8 5/8" 3-1/2 1/2-inch a/c A/C mp3/mp4 black/white/red
plan b. he saw plan a. The x. end
it's it'S IT'S He'll we're they've I'm i'd'v she'd've who's there's dogs's ones' James' cat'n dog
don't DON'T Don’t couldn't've isn't; n't can't've
'tis 'Tis 'twas 'cause 'bout 'til 'round 'er 'im 'he 'a 'the 'red' 'red "a" 'a dog's'
the sign says 'stop'. the sign says "stop". the sign "stop," said
pepsi-cola's coca-cola® mcdonald's mcdonalds' o'clock's
red,white,and blue red/white & blue red&white red+white red=white
(a) (a [b] c) man(s) dog(s). (left) a ( b ) 8) xD
#2 no.2 no. 2 No. 2 no.  hi
3'6 6'2" 12' 12'' 2x4 5lb 5lbs. 10kg 3D 3-D 2nd-floor 10-foot-tall
a.m 7am 7 a.m. 7:00a.m. 7:00 p.m., 12pm 1:5
half-eaten half - eaten half -eaten half- eaten half--eaten half—eaten half–eaten half — eaten 2–3
man/woman man / woman man/ woman man /woman and/or/not 1/ 2
!a ?b .c ,d ;e :f -g --h &i *j +k =l %m ~n ^o |p \q /r $s
a! b? d, e; f: g- h-- i& j* k+ l= m% n~ o^ p| q\ r/ s$
$20 $ 20 £20 €20 ¥20 20¢ 20c 20$ 20€ c$
white.  white . white .. white...
Dr.Smith St.Louis U.S.A.'s U.S.-made u.s.a
A.B. a.b. a.b ab. a.b.c. ph.d. Ph.D. b.c. B.C. l.a. L.A. n.y.
feb.12 12th. 12th 1st. etc.) etc., (etc.) "etc."
let's lets let s s's 's 'S 've 're 'll 'd 'm n't
_a a_b_c a_ __ a*b *a* a**b a~b ~a a|b a^b a\b
two’s two‘s “two” two′ ´two´
e-mail. pre-. -pre. -pre- --pre-- a-1 1-a a-1-b A-1's
x.y. x.y.z x.y,z x,y.z 1,a a,1 1.a a.1 1:a a:1 1;2 a'b a'1 1'a 1'2
&amp &nbsp; &#39; &lt;b&gt; & amp;
ain't' "'hi'" '"hi"' `hi' ``hi''"""
ODD = _ODD.split("\n")

_LANGUAGES = """एक बिल्ली सोफे पर बैठी है
सोफे पर एक सफ़ेद बिल्ली
एक कुत्ता घास पर दौड़ रहा है।
नीली कार सड़क पर खड़ी है
แมวนั่งอยู่บนโซฟา
แมวสองตัว กำลังเล่นน้ำ
قِطَّة على الأريكة
كلب بني يجري في الحديقة.
חתול יושב על הספה
μια γάτα στον καναπέ
con mèo ngồi trên ghế
дві кішки сидять на дивані
двa м'яч на полі
两只猫坐在沙发上。
ソファに猫が座っている。
개 한 마리가 소파에 앉아 있다.
İstanbul'da bir kedi
eine Straße mit Bäumen und Häusern
Katzen „schlafen“ auf dem Sofa
¿Dónde está el gato? ¡Aquí!
un hombre está ñandú
dell'acqua un'auto
nell'erba c'è
Une cuillère à café.
un café à côté d'une crêperie
un chat d'un homme
s'il y a l'été
qu'une femme qu'il
l'eau l'air
l'homme aujourd'hui qu'il
lorsqu'il
l'école d'été
l'œuf
à l'arrière d'un bus
près d'un étang
les enfants jusqu'à l'église
photo de l'île
gens d'État
«un chat» noir
a\u200bb
m² km²
j'ai
l'homme-là"""
# and the same with accents that stand behind their letters
LANGUAGES = [
    *_LANGUAGES.split("\n"),
    *unicodedata.normalize("NFD", "un café à côté d'une crêperie\nZwei Vögel\nmèo").split("\n"),
]


def captions(count: int) -> list[str]:
    rng = random.Random(0)
    parts = (WHO, DOES, WHAT, WHERE)
    lines = [" ".join(rng.choice(part) for part in parts) + rng.choice(END) for _ in range(count)]
    return [line.upper() if rng.random() < 0.03 else line for line in lines]


def main() -> None:
    odd = [word for line in ODD for word in re.split(r"(?<=\S) (?=\S)", line)] + ODD
    content = {}
    for name, lines in (("captions", captions(2000)), ("odd", list(dict.fromkeys(odd))), ("languages", LANGUAGES)):
        found = PTBTokenizer().tokenize({number: [{"caption": line}] for number, line in enumerate(lines)})
        content[name] = [[line, found[number][0]] for number, line in enumerate(lines)]
    out = Path(__file__).with_name("ptb.json.gz")
    out.write_bytes(gzip.compress(json.dumps(content, ensure_ascii=False, indent=0).encode(), mtime=0))
    print(f"{out.name}: {out.stat().st_size:,} bytes, { ({name: len(rows) for name, rows in content.items()}) }")


if __name__ == "__main__":
    main()
