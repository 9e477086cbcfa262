-- The job that writes `user_features` and its log: profiles from PostgreSQL, and what a user was shown last.

SET 'pipeline.name' = 'lake.user_features';
CREATE TEMPORARY VIEW user_changes AS
SELECT
  changed_ms AS event_time_ms, user_id, changed_ms AS profile_ms,
  -- One that was deleted: nothing is known from then on.
  CASE WHEN kind <> '-D' THEN country END AS country,
  CASE WHEN kind <> '-D' THEN `language` END AS `language`,
  CASE WHEN kind <> '-D' THEN age END AS age,
  CAST(NULL AS BIGINT) AS activity_ms, CAST(NULL AS BIGINT) AS last_video_id, CAST(NULL AS BIGINT) AS last_author_id,
  CAST(NULL AS BIGINT) AS last_duration_ms, CAST(NULL AS ARRAY<BIGINT>) AS last_tag_id
FROM user_profile_changes
UNION ALL
SELECT
  event_time_ms, user_id, CAST(NULL AS BIGINT), CAST(NULL AS STRING), CAST(NULL AS STRING), CAST(NULL AS BIGINT),
  event_time_ms, video_id, author_id, duration_ms, tag_id
FROM impressions
WHERE is_event;

EXECUTE STATEMENT SET
BEGIN
INSERT INTO paimon.lake.user_features
SELECT
  user_id, profile_ms, country, `language`, age, activity_ms, last_video_id, last_author_id, last_duration_ms, last_tag_id
FROM user_changes;
INSERT INTO paimon.lake.user_features_log
SELECT
  event_time_ms, DATE_FORMAT(TO_TIMESTAMP_LTZ(event_time_ms, 3), 'yyyy-MM-dd'),
  user_id, profile_ms, country, `language`, age, activity_ms, last_video_id, last_author_id, last_duration_ms, last_tag_id
FROM user_changes;
END;
